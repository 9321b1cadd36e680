"""What a student minimises: losses against a teacher that runs, or whose logits were stored."""
