// Plans and profiles as plain rows for Python.
#pragma once

#include <pybind11/pybind11.h>

#include "plan/profile.h"

namespace fastmaml {

pybind11::dict cost_rows(const Plan& plan);  // the plan's sizes, and a dict for each Step
pybind11::list profile_rows();               // stop_profile, the same with times for each plan

}  // namespace fastmaml
