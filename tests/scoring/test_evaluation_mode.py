import torch

from falign.scoring import evaluation_mode


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train()
    model[1].eval()
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert [module.training for module in model.modules()] == [True, True, False, False]
