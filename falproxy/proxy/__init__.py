"""The formula: a call goes to fal, and its response comes back."""
