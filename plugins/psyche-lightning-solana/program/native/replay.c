// Runs recorded instructions. From standard input it reads, for each, `slot u64, timestamp i64, length u64` and as many
// bytes: the buffer that the loader would hand to the program (common/entry.c). To standard output it writes `result
// u64, log length u64`, the log, and the buffer as the program left it. What a refusal leaves is to be dropped.
#include "native/shim.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct {
  u64 slot;
  i64 timestamp;
  u64 length;
} Header;

int main(void) {
  Header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) {
    u8 *buffer = aligned_alloc(16, (header.length + 15) & ~15ull);
    if (!buffer || fread(buffer, 1, header.length, stdin) != header.length) return 1;
    Input input;
    read_input(buffer, &input);
    u64 answer[2];
    set_machine(&input, header.slot, header.timestamp);
    answer[0] = entrypoint(buffer);
    answer[1] = MACHINE.log_length;
    fwrite(answer, sizeof answer, 1, stdout);
    fwrite(MACHINE.log, 1, MACHINE.log_length, stdout);
    fwrite(buffer, 1, header.length, stdout);
    fflush(stdout);
    free(buffer);
  }
  return 0;
}
