#include "samples.hpp"

#include <fstream>
#include <sstream>
#include <stdexcept>

namespace digits {

Samples Samples::rows_at(const std::vector<std::size_t>& rows) const {
  Samples result;
  for (const std::size_t row : rows) {
    const float* image = pixels.data() + row * pixels_per_image;
    result.pixels.insert(result.pixels.end(), image, image + pixels_per_image);
    result.labels.push_back(labels[row]);
  }
  return result;
}

Samples Samples::where(const std::function<bool(std::size_t label)>& wanted) const {
  std::vector<std::size_t> chosen;
  for (std::size_t row = 0; row < rows(); ++row) {
    if (wanted(labels[row])) chosen.push_back(row);
  }
  return rows_at(chosen);
}

Samples read_samples(const std::string& file) {
  std::ifstream in(file);
  if (!in) throw std::runtime_error(file + ": cannot be opened");
  Samples samples;
  std::string text;
  while (std::getline(in, text)) {
    const std::string place = file + ":" + std::to_string(samples.rows() + 1);
    std::istringstream line(text);
    int value = 0;
    char comma = ',';
    for (std::size_t i = 0; i < pixels_per_image; ++i) {
      if (!(line >> value >> comma) || comma != ',' || value < 0 || value > 16) {
        throw std::runtime_error(place + ": pixel " + std::to_string(i) + " is not a number from 0 to 16");
      }
      samples.pixels.push_back(static_cast<float>(value) / 16);
    }
    if (!(line >> value) || value < 0 || value > 9) throw std::runtime_error(place + ": the label is not a digit");
    samples.labels.push_back(static_cast<std::size_t>(value));
  }
  if (samples.rows() == 0) throw std::runtime_error(file + ": holds no row");
  return samples;
}

}  // namespace digits
