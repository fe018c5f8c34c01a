"""Square windows of images: where they lie, which objects they hold, and the masks of these objects in them."""
