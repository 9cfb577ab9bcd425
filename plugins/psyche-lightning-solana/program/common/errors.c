#include "common/errors.h"

#include "common/syscalls.h"

// Set in an error whose line is in the log already.
#define LOGGED (1ull << 63)
#define MAX_LINE 320

static const ErrorText FRAMEWORK[] = {
#define X(name, number, message) {number, #name, message},
    FRAMEWORK_ERRORS(X)
#undef X
};

typedef struct {
  char text[MAX_LINE];
  u64 length;
} Line;

static NOINLINE void put(Line *line, const char *text) {
  for (u64 i = 0; i < MAX_LINE && text[i] != 0 && line->length < MAX_LINE; i++) line->text[line->length++] = text[i];
}

static NOINLINE void put_number(Line *line, u64 number) {
  char digits[20];
  u64 count = 0;
  do {
    digits[count++] = (char)('0' + number % 10);
    number /= 10;
  } while (number != 0 && count < sizeof digits);
  while (count > 0 && line->length < MAX_LINE) line->text[line->length++] = digits[--count];
}

static const ErrorText *find(const ErrorText *table, u64 length, u64 number) {
  for (u64 i = 0; i < length; i++)
    if (table[i].number == number) return &table[i];
  return 0;
}

static NOINLINE void log_error(const char *account, u64 number) {
  const ErrorText *known = find(FRAMEWORK, COUNT(FRAMEWORK), number);
  if (known == 0) known = find(PROGRAM_ERRORS, PROGRAM_ERRORS_LENGTH, number);
  if (known == 0) return;
  Line line;
  line.length = 0;
  if (account == 0) {
    put(&line, "AnchorError occurred");
  } else {
    put(&line, "AnchorError caused by account: ");
    put(&line, account);
  }
  put(&line, ". Error Code: ");
  put(&line, known->name);
  put(&line, ". Error Number: ");
  put_number(&line, number);
  put(&line, ". Error Message: ");
  put(&line, known->message);
  put(&line, ".");
  sol_log_(line.text, line.length);
}

NOINLINE u64 fail_account(const char *account, u64 error) {
  log_error(account, error);
  return error | LOGGED;
}

NOINLINE u64 report(u64 error) {
  if (error != 0 && !(error & LOGGED)) log_error(0, error);
  return error & ~LOGGED;
}
