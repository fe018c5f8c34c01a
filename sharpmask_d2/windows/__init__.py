"""Square windows of images, for both pyramids: their geometry, their labels, and the masks of objects in them."""
