"""A page that shows what a checkpoint sees in scans: one HTML file, or a server on this machine."""
