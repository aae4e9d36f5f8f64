"""What phones can do with a bundle at best: ceilings by its files and by published figures."""
