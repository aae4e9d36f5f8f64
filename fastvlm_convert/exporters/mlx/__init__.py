"""Write what mlx-vlm and Apple's app load: weights by name, and settings to look up; there is no graph."""
