"""Training many branches at the price of one: the same outputs, gradients and running statistics, executed merged."""
