// How fast so many threads read memory that no cache holds: what a decoding step can at best do with its weights.
//
//     cc -O3 -march=native -pthread bandwidth.c -o bandwidth && ./bandwidth THREADS
//
// Each pass reads 512 MiB once, every thread a part of it, with loads as wide as the CPU's vectors and sums that do not
// wait for one another. A thread reads at four places by turns, as a kernel does that takes four rows of a matrix at a
// time: that keeps more of the CPU's prefetchers busy, and reads up to a fifth more than one place does.
// Prints one line of JSON: the bytes per second of the best pass and of the median one.

#ifdef __linux__
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { BYTES = 512 << 20, PASSES = 15, MAX_THREADS = 256, PLACES = 4, LINE = 2, LANES = 4 };
typedef uint64_t vector __attribute__((vector_size(LANES * sizeof(uint64_t))));

struct part {
  const vector *begin, *end;
  uint64_t sum;
};

static void *read_part(void *argument) {
  struct part *part = argument;
  vector sums[PLACES][LINE] = {0};
  size_t apart = (part->end - part->begin) / PLACES;
  for (size_t at = 0; at + LINE <= apart; at += LINE)
    for (int place = 0; place < PLACES; place++)
      for (int i = 0; i < LINE; i++) sums[place][i] ^= part->begin[place * apart + at + i];
  for (int place = 0; place < PLACES; place++)
    for (int i = 0; i < LINE; i++)
      for (int lane = 0; lane < LANES; lane++) part->sum ^= sums[place][i][lane];
  return NULL;
}

static double now_s(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double pass_s(const vector *memory, int threads, uint64_t *sum) {
  pthread_t others[MAX_THREADS];
  struct part parts[MAX_THREADS];
  size_t count = BYTES / sizeof(vector);
  double start = now_s();
  for (int i = 0; i < threads; i++) {
    parts[i] = (struct part){memory + count * i / threads, memory + count * (i + 1) / threads, 0};
    if (i > 0 && pthread_create(&others[i], NULL, read_part, &parts[i]) != 0) exit(1);
  }
  read_part(&parts[0]);
  for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
  double seconds = now_s() - start;
  for (int i = 0; i < threads; i++) *sum ^= parts[i].sum;
  return seconds;
}

int main(int count, char **arguments) {
  int threads = count == 2 ? atoi(arguments[1]) : 0;
  if (threads < 1 || threads > MAX_THREADS) return fprintf(stderr, "usage: bandwidth THREADS\n"), 2;
  void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (memory == MAP_FAILED) return perror("mmap"), 1;
#ifdef MADV_HUGEPAGE
  madvise(memory, BYTES, MADV_HUGEPAGE);
#endif
  memset(memory, 1, BYTES);
  uint64_t sum = 0;
  double seconds[PASSES];
  pass_s(memory, threads, &sum);
  for (int i = 0; i < PASSES; i++) seconds[i] = pass_s(memory, threads, &sum);
  qsort(seconds, PASSES, sizeof *seconds, by_size);
  printf("{\"best_bytes_per_s\": %.0f, \"median_bytes_per_s\": %.0f, \"sum\": %llu}\n", BYTES / seconds[0],
         BYTES / seconds[PASSES / 2], (unsigned long long)sum);
}
