"""What is shipped beside the artifacts, and writing a bundle whole or not at all."""
