"""How fast brain_jax is beside other programs that run the same network, on the CPU of one machine."""
