"""Finite element kernels: arrays of functions, operators and factorisations on blocks of states."""
