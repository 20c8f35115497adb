// Which kernel table is in use.
#pragma once

#include "kernels.h"

namespace fasttx {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*supported)();  // by this machine
  bool (*preferred)();  // over those before it, where it is supported
};

extern const Isa kIsas[];  // from the plainest to the most capable
extern const int kNumIsas;

// The last that is supported and preferred.
const Isa& default_isa();

// The table in use: until set_isa names one, the default's.
const KernelTable& table();

// The entry of that name, or null.
const Isa* find_isa(const char* name);

// Makes a supported table the one in use from now on, for every thread.
void set_isa(const Isa& isa);

}  // namespace fasttx
