// Reads the symbol table of this program or library: kernels by address, and the places of their __shared__ variables.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <unordered_map>

#include "cuda/emulated/state.h"

namespace fastmaml::emu {
namespace {

// The anchor's place in thread-local memory shows where the module's part begins.
thread_local char anchor asm("fastmaml_emu_anchor");

constexpr const char kTag[] = "B6kernel";  // what __global__ adds to the name of a function

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string name = text ? text : symbol;
  std::free(text);
  return name;
}

// nvcc's name of the same kernel.
std::string nvcc_name(std::string symbol) {
  const std::string ours = "13cuda_emulated", theirs = "4cuda";
  for (size_t at; (at = symbol.find(kTag)) != std::string::npos;) symbol.erase(at, sizeof kTag - 1);
  for (size_t at; (at = symbol.find(ours)) != std::string::npos;) symbol.replace(at, ours.size(), theirs);
  return symbol;
}

struct Module {
  struct SharedVariable {
    std::string name;
    uint64_t offset;
    size_t bytes;
    std::string kernel;    // the kernel that declares it; empty: a device function, which any kernel may call
    std::string variable;  // the name in the source
  };
  uintptr_t base = 0;
  std::string path;
  std::unordered_map<uint64_t, std::string> kernels;  // by offset from base
  std::vector<SharedVariable> shared;
  uint64_t anchor_offset = 0, shared_bytes = 0;  // within thread-local memory
  uint64_t image_bytes = 0;

  Module() {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&kernel_symbol), &info);
    path = info.dli_fname ? info.dli_fname : "";
    link_map* map = nullptr;
    dladdr1(reinterpret_cast<const void*>(&kernel_symbol), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP);
    if (map) base = map->l_addr;
    char own[4096];
    const ssize_t length = readlink("/proc/self/exe", own, sizeof own);
    if (map && !*map->l_name && length > 0) path.assign(own, size_t(length));  // the program itself
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() > sizeof(ElfW(Ehdr))) read(bytes.data());
    for (SharedVariable& v : shared) {
      for (const auto& [offset, kernel] : kernels)
        if (v.name.rfind("_ZZ" + kernel.substr(2) + "E", 0) == 0) v.kernel = nvcc_name(kernel);
      v.variable = demangled(v.name);
      v.variable = v.variable.substr(v.variable.rfind(':') + 1);
    }
    for (auto& [offset, kernel] : kernels) kernel = nvcc_name(kernel);
  }

  void read(const char* file) {
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file);
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file + header->e_shoff);
    const auto* segments = reinterpret_cast<const ElfW(Phdr)*>(file + header->e_phoff);
    for (int s = 0; s < header->e_phnum; ++s) {
      if (segments[s].p_type == PT_LOAD) image_bytes = std::max<uint64_t>(image_bytes, segments[s].p_vaddr + segments[s].p_memsz);
      if (segments[s].p_type == PT_TLS) shared_bytes = segments[s].p_memsz;
    }
    for (int s = 0; s < header->e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file + sections[s].sh_offset);
      const char* names = file + sections[sections[s].sh_link].sh_offset;
      for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; ++i) add(names + symbols[i].st_name, symbols[i]);
    }
  }

  void add(const std::string& name, const ElfW(Sym) & symbol) {
    const int type = symbol.st_info & 15;  // ELF32_ST_TYPE, the same in ELF64
    if (type == STT_TLS && name == "fastmaml_emu_anchor") anchor_offset = symbol.st_value;
    const bool of_kernel = name.find(kTag) != std::string::npos, local = name.rfind("_ZZ", 0) == 0;
    if (type == STT_FUNC && of_kernel && !local && name.find('.') == std::string::npos) kernels[symbol.st_value] = name;
    if (type == STT_TLS && local && (of_kernel || name.find("13cuda_emulated") != std::string::npos))
      shared.push_back({name, symbol.st_value, symbol.st_size, "", ""});
  }
};

const Module& module() {
  static const Module& it = *new Module;  // never destroyed: names are needed when the program ends
  return it;
}

const unsigned char* first_shared() { return reinterpret_cast<const unsigned char*>(&anchor) - module().anchor_offset; }

}  // namespace

std::string kernel_symbol(const void* kernel) {
  const auto found = module().kernels.find(reinterpret_cast<uintptr_t>(kernel) - module().base);
  if (found == module().kernels.end())
    throw std::runtime_error("the emulator needs the symbol table, which was stripped from " + module().path);
  return found->second;
}

std::vector<std::string> compiled_kernels() {
  std::vector<std::string> names;
  for (const auto& [offset, name] : module().kernels) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

const std::vector<Range>& static_shared(const void* kernel) {
  thread_local std::unordered_map<const void*, std::vector<Range>> known;
  const auto [found, fresh] = known.try_emplace(kernel);
  if (!fresh) return found->second;
  const std::string own = kernel_symbol(kernel);
  for (const Module::SharedVariable& v : module().shared)
    if (v.kernel.empty() || v.kernel == own) found->second.push_back({first_shared() + v.offset, v.bytes, v.variable.c_str()});
  return found->second;
}

Range static_neighbourhood() { return {first_shared(), module().shared_bytes, ""}; }
Range image() { return {reinterpret_cast<const unsigned char*>(module().base), module().image_bytes, ""}; }

std::string readable(const std::string& symbol) {
  std::string name = demangled(symbol);
  const std::string space = "fastmaml::cuda::";
  if (const size_t at = name.find(space); at != std::string::npos) name = name.substr(at + space.size());
  int depth = 0;  // depth of template brackets; the parameters begin at the first ( outside them
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string code_position(const void* address) {
  static std::unordered_map<const void*, std::string> known;
  std::string& position = known[address];
  if (!position.empty()) return position;
  char text[4352];
  const size_t offset = reinterpret_cast<uintptr_t>(address) - module().base;
  std::snprintf(text, sizeof text, "0x%zx", offset);
  position = text;
  std::snprintf(text, sizeof text, "addr2line -e '%s' 0x%zx 2> /dev/null", module().path.c_str(), offset);
  if (FILE* pipe = popen(text, "r")) {
    std::string line = std::fgets(text, sizeof text, pipe) ? text : "";
    pclose(pipe);
    line = line.substr(line.rfind('/') + 1);
    line = line.substr(0, line.find_first_of(" \n"));
    if (!line.empty() && line[0] != '?') position = line;
  }
  return position;
}

}  // namespace fastmaml::emu
