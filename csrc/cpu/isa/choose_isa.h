// The instruction set of the cpu backend: the widest that this machine has, or a chosen one.
#pragma once

#include <string>
#include <vector>

namespace fastmaml {

std::vector<std::string> available_cpu_isas();  // narrowest first; all of them run on this machine
std::string cpu_isa();
void set_cpu_isa(const std::string& name);  // "" restores the default; std::invalid_argument if this machine cannot run it

}  // namespace fastmaml
