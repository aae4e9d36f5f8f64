"""One page about a bundle, for people: does it answer like its checkpoint, and what does it cost?"""
