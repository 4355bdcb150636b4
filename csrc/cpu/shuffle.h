// SHUFFLE(Indices, a, b, i0, i1, ...): a vector of those elements of a and b, which are numbered one after the other.
// Indices: a vector of integers as wide as the elements.
#pragma once

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(Indices, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(SHUFFLE)  // GCC before 12
#define SHUFFLE(Indices, a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif
