"""The compressed network in the package: made by the default recipe, and close to the teacher's flow in ten steps."""

import torch

from pqcad_ao.config import PQCADConfig
from pqcad_ao.diffusion.ddim import DDIMSchedule
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.diffusion.schedule import timesteps_of
from pqcad_ao.diffusion.solvers import dpmpp_2m
from pqcad_ao.evaluate.sqnr import sqnr_db
from pqcad_ao.models import load_model
from pqcad_ao.nn.state import quantized_state


def test_it_was_made_by_the_default_recipe():
    unet, scheduler = load_model("demo-w4a6")
    state = quantized_state(unet)
    assert state is not None
    assert state.config == PQCADConfig()
    assert state.timestep.schedule == timesteps_of(scheduler, 10)
    assert state.plan.average_bits < 4.01


def test_it_draws_in_ten_steps_where_the_teachers_flow_leads():
    (teacher, scheduler), (unet, sampler) = load_model("demo"), load_model("demo-w4a6")
    noise = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(12345))
    flow = DDIMSchedule.of(scheduler, 40)
    with torch.no_grad():
        arrived = dpmpp_2m(lambda x, t: teacher(x, t).sample, flow, noise, torch.zeros(8, dtype=torch.int64), 40)
        in_ten = sample(teacher, scheduler, noise, 10)
    drawn = sample(unet, sampler, noise, 10)
    assert sqnr_db(arrived, drawn) > sqnr_db(arrived, in_ten) + 3
