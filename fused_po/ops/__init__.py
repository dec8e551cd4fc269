"""One file an op: its schema, fake, autograd formula, and the public function over it."""
