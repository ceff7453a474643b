"""The lottery-ticket driver: finds masks by iterative magnitude pruning, and trains what remains with sparse kernels."""
