"""DICOM: headers and frames, their grouping into stacks, pixels, and images without a place in the patient."""
