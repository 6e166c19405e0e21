"""Models of other libraries, tiny and with random weights; `zoo_others.py` checks them."""
