"""One file per op: its schema, its fake, its backward, and the public function that calls it."""
