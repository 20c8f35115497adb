#include "dispatch.h"

#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fasttx {

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512Bf16Table;
extern const KernelTable kAmxTable;
extern const KernelTable kAmxFloat32Table;
#endif

namespace {

bool always() { return true; }
bool only_if_asked() { return false; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// A process has to ask Linux for the tile registers before it uses them; the answer holds for all of its threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  static const bool has = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d);
    return known && (d & kBf16) && (d & kTile) && has_avx512_bf16() && may_use_tiles();
  }();
  return has;
}

// Zen 4 runs vdpbf16ps at twice the rate of float32's multiply-add in values a cycle, Sapphire Rapids at half: there
// widening bfloat16 and multiplying in float32 measured 1.7 times as fast.
bool bf16_products_are_fast() { return __builtin_cpu_is("amd"); }
#endif

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const Isa kIsas[] = {
    {"scalar", &kScalarTable, always, always},
#if defined(__x86_64__)
    {"avx2", &kAvx2Table, has_avx2, always},
    {"avx512", &kAvx512Table, has_avx512, always},
    {"avx512_bf16", &kAvx512Bf16Table, has_avx512_bf16, bf16_products_are_fast},
    {"amx", &kAmxTable, has_amx, always},
    // Float32 by the matrix unit too: up to 1.5 times as fast as by vectors, and down to 0.7 times where other work
    // on the core's second hardware thread slows that unit, which on shared machines is most of the time.
    {"amx_float32", &kAmxFloat32Table, has_amx, only_if_asked},
#endif
};
const int kNumIsas = sizeof(kIsas) / sizeof(kIsas[0]);

const Isa* find_isa(const char* name) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (strcmp(name, kIsas[i].name) == 0) return &kIsas[i];
  }
  return nullptr;
}

void set_isa(const Isa& isa) { current = isa.table; }

const Isa& default_isa() {
  int best = kNumIsas - 1;
  while (!kIsas[best].supported() || !kIsas[best].preferred()) --best;
  return kIsas[best];
}

const KernelTable& table() {
  const KernelTable* in_use = current.load(std::memory_order_relaxed);
  if (in_use != nullptr) return *in_use;
  const KernelTable* expected = nullptr;
  current.compare_exchange_strong(expected, default_isa().table);
  return *current.load();
}

}  // namespace fasttx
