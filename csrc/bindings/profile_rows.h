// Plans and profiles as plain rows for Python.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/profile.h"

namespace fastmaml {

pybind11::list cost_rows(const Plan& plan);  // a dict for each Step
pybind11::list profile_rows();               // stop_profile, a dict for each plan

}  // namespace fastmaml
