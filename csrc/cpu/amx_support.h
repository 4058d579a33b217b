// Whether this process can use AMX's tile registers.
#pragma once

namespace magnet_fast {

/// The processor multiplies tiles of bfloat16, and the operating system saves the tiles of a process that
/// asks.
bool has_amx();

/// Asks the operating system for them, for all threads; false when it refuses. Not done before the level is
/// wanted: from then on it saves 8 KiB more for a thread with tiles in use, and insists on signal stacks with
/// room for them.
bool request_amx();

}  // namespace magnet_fast
