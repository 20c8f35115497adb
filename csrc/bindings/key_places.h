// Which keys of a batch take part in attention at all.
#pragma once

#include "common.h"

namespace fasttx::bindings {

// Where a boolean mask keeps keys from every query of a sequence, as padding is, the shape is given what is left:
// lengths, places where those keys are not a sequence's first, and no mask where it says nothing else. Lengths and
// places lie in `memory`.
void leave_out_unseen_keys(AttentionShape& shape, std::optional<Workspace>& memory);

}  // namespace fasttx::bindings
