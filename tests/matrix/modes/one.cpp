// The sources of the other modes as one.
#include "main.cpp"
#include "other.cpp"
