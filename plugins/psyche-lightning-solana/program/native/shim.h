// The runtime's syscalls on this machine (native/shim.c), and what drives them.
#pragma once
#include "common/entry.h"

#define MAX_LOG 4096

// What the next instruction sees and leaves. The accounts are those of its input.
typedef struct {
  i64 timestamp;
  u64 slot;
  const Input *input;
  char log[MAX_LOG];
  u64 log_length;
} Machine;

extern Machine MACHINE;

// Set the time, and the accounts among which addresses are found. What a refusal leaves is half-changed: undo it.
void set_machine(const Input *input, u64 slot, i64 timestamp);
