// What project_twice is given.
#pragma once

#include "params/project.h"

namespace flashmla {

// Two products, the second one of what the first one makes: first.y, which is second.x, has
// first.groups * first.n = second.groups * (second.k + second.rope) columns a row.
struct ProjectTwiceParams {
  ProjectParams first, second;
};

}  // namespace flashmla
