"""The model's operations: plain definitions in ``reference``, and the back ends that compute the same faster."""
