"""Images and bytes: validation, formats, and the reading of URLs that users name."""
