"""The interface of a backend, and the selection of the backend for an op."""
