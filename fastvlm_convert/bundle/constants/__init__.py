"""What an app must know of a bundle, as source code in the app's language."""
