// All sources of the program in one file.
#include "main.cpp"
#include "other.cpp"
