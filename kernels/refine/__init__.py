"""Choose among proposed blocks by their exact logits."""
