"""What an adapter is: where it goes, its modules and factors, how a model is cut into what trains and what is frozen."""
