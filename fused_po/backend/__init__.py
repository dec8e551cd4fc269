"""A backend's interface, and which backend runs an op."""
