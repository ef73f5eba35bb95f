"""What a user takes home: a network fine-tuned on labelled cases, and what it says of the next scan."""
