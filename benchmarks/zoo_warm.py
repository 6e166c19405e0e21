"""Imported once by the server from which `zoo.py` forks its processes: imports take seconds."""

import timm
import torch
import zoo_checks
import zoo_models

import bayesify

torch.set_num_threads(1)
# a first trace imports much of torch
with torch.device("meta"), torch.no_grad():
    bayesify.to_bbb_(timm.create_model("test_vit"))(torch.empty(1, 3, 160, 160))
    assert zoo_checks
    assert zoo_models.names()
