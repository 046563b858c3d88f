// Plans and profiles as rows of plain numbers for Python.
#pragma once

#include <pybind11/pybind11.h>

#include "plan/profile.h"

namespace fastmaml {

pybind11::dict cost_rows(const Plan& plan);  // the plan's sizes, and a dict for each Step
pybind11::list profile_rows();               // stops the profile; cost_rows with times, for each plan

}  // namespace fastmaml
