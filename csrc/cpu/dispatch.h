// Which kernel table is in use: the best that the machine has, unless set_isa names another.
#pragma once

#include "kernels.h"

namespace fasttx {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*supported)();  // by this machine
};

extern const Isa kIsas[];  // from the plainest to the most capable
extern const int kNumIsas;

const KernelTable& table();

// The entry of that name, or null.
const Isa* find_isa(const char* name);

// Makes a supported table the one in use from now on, for every thread.
void set_isa(const Isa& isa);

}  // namespace fasttx
