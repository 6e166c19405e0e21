"""Models of other libraries at tiny configurations, with random weights; `zoo_others.py` checks them."""
