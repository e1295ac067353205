"""Records what a serving engine gives to a backend, call by call, to make saved cases of it."""
