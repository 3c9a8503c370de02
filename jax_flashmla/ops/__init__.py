"""The operations, a file each, as users call them."""
