"""Images to beton files, beton files to views."""
