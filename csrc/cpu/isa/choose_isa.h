// Which instruction set the cpu backend runs on: the widest this machine has, or the one asked for.
#pragma once

#include <string>
#include <vector>

namespace fastmaml {

std::vector<std::string> available_cpu_isas();  // narrowest first; all of them run on this machine
std::string cpu_isa();
void set_cpu_isa(const std::string& name);  // "" restores the default; std::invalid_argument where it cannot run here

}  // namespace fastmaml
