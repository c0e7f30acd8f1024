"""What happens around every call, one middleware a file."""
