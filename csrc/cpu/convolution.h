// Convolutions of rows: Winograd's F(4, 3) where products are of float32, else one product per tap.
//
// Nine taps are three groups of three. F(4, 3) computes four outputs of three taps with six products instead of twelve
// (Lavin and Gray 2016, arXiv:1509.09308), with points 0, 1, -1, 2, -2 and infinity. The groups' products are summed before
// the results are transformed back. Outputs go in fours that are counted from a protein's first row, those of a dilated
// convolution `dilation` rows apart, and rows behind a protein count as zeros: so a row's bits do not depend on the batch.

constexpr int kOutputs = 4;
constexpr int kPoints = 6;
constexpr int kGroupTaps = 3;
// Fours that are transformed and multiplied at a time: their inputs stay in the second-level cache.
constexpr int kFours = 2 * PBF_ROWS > 16 ? 2 * PBF_ROWS : 4 * PBF_ROWS;

// Four outputs, `dilation` rows apart from `row` on. Rows from `end` on are behind the protein.
struct Four {
    int row, end;
};

// Those of runs whose first rows are multiples of kOutputs * dilation away from their protein's.
inline void fours_of(const Runs& runs, int dilation, std::vector<Four>& fours) {
    fours.clear();
    for (const Run& run : runs)
        for (int row = run.first; row < run.first + run.rows; row += kOutputs * dilation)
            for (int phase = 0; phase < std::min(dilation, run.first + run.rows - row); ++phase)
                fours.push_back({row + phase, run.end});
}

// The six inputs of a group's products from six rows.
template <class T>
inline void transform_input(const T* const rows[kPoints], int channels, float* out, std::int64_t stride) {
    for (int c = 0; c < channels; c += kLanes) {
        const Floats d0 = load(rows[0] + c), d1 = load(rows[1] + c), d2 = load(rows[2] + c), d3 = load(rows[3] + c),
                     d4 = load(rows[4] + c), d5 = load(rows[5] + c);
        const Floats a = d4 - 4.0f * d2, b = d3 - 4.0f * d1, e = d4 - d2, f = 2.0f * (d3 - d1);
        float* o = out + c;
        store(o, 4.0f * d0 - 5.0f * d2 + d4);
        store(o + stride, a + b);
        store(o + 2 * stride, a - b);
        store(o + 3 * stride, e + f);
        store(o + 4 * stride, e - f);
        store(o + 5 * stride, 4.0f * d1 - 5.0f * d3 + d5);
    }
}

// Four results from the sums of the six products; those beyond `rows` are not written.
inline void transform_output(const float* sums, std::int64_t stride, const float* bias, int channels, int rows, float* out,
                             std::int64_t out_stride) {
    for (int c = 0; c < channels; c += kLanes) {
        const float* y = sums + c;
        const Floats y0 = load(y), y1 = load(y + stride), y2 = load(y + 2 * stride), y3 = load(y + 3 * stride),
                     y4 = load(y + 4 * stride), y5 = load(y + 5 * stride);
        const Floats start = bias ? load(bias + c) : Floats{};
        const Floats s = y1 + y2, t = y1 - y2, p = y3 + y4, q = y3 - y4;
        float* o = out + c;
        store(o, start + (y0 + s + p));
        if (rows > 1) store(o + out_stride, start + (t + 2.0f * q));
        if (rows > 2) store(o + 2 * out_stride, start + (s + 4.0f * p));
        if (rows > 3) store(o + 3 * out_stride, start + (t + 8.0f * q + y5));
    }
}

// What the weights of a group's three taps are multiplied by, for each of the six products.
constexpr double kFromTaps[kPoints][kGroupTaps] = {
    {1.0 / 4, 0, 0},
    {-1.0 / 6, -1.0 / 6, -1.0 / 6},
    {-1.0 / 6, 1.0 / 6, -1.0 / 6},
    {1.0 / 24, 1.0 / 12, 1.0 / 6},
    {1.0 / 24, -1.0 / 12, 1.0 / 6},
    {0, 0, 1},
};

// A convolution of (rows, channels) to as many, its weights packed for this instruction set.
template <class T>
class Convolution {
public:
    using E = Factor<T>;
    static constexpr bool kMayTransform = std::is_same_v<E, float>;

    // Weights are w[column * column_stride + input * input_stride + tap * tap_stride]; bias is (channels,) or null.
    Convolution(const T* w, std::int64_t column_stride, int input_stride, int tap_stride, const float* bias, int channels,
                int taps, int dilation, int threads)
        : bias_(bias), channels_(channels), taps_(taps), dilation_(dilation),
          transforms_(kMayTransform && taps % kGroupTaps == 0) {
        const int inputs = transforms_ ? taps / kGroupTaps * channels : channels;
        const int matrices = transforms_ ? kPoints : 1;
        const std::int64_t values = std::int64_t{inputs} * channels * (transforms_ ? 1 : taps);
        E* room = weights_.room(values * matrices);
        for (int j = 0; j < matrices; ++j)
            products_[j] = {room + j * values, transforms_ ? nullptr : bias, inputs, channels, transforms_ ? 1 : taps, dilation,
                            channels};
        parallel_for(channels / 16, threads, [&](std::int64_t sixteen) {
            std::vector<float> column(transforms_ ? inputs : 0);
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                const T* from = w + c * column_stride;
                if (!transforms_) {
                    pack_column(from, input_stride, tap_stride, products_[0], c, room);
                    continue;
                }
                if constexpr (kMayTransform)
                    for (int j = 0; j < kPoints; ++j) {
                        for (int i = 0; i < inputs; ++i) {
                            const T* taps_of = from + std::int64_t{i % channels} * input_stride +
                                               std::int64_t{i / channels} * kGroupTaps * tap_stride;
                            double sum = 0;
                            for (int k = 0; k < kGroupTaps; ++k)
                                sum += kFromTaps[j][k] * static_cast<double>(number(taps_of[k * tap_stride]));
                            column[i] = static_cast<float>(sum);
                        }
                        pack_column(column.data(), 1, 0, products_[j], c, room + j * values);
                    }
            }
        });
    }

    // Rows a run must be a multiple of behind its protein's first.
    static constexpr int alignment(int dilation) { return kOutputs * dilation; }

    // Runs of `x` (rows, channels) to those of `out`; as many rows around them as the taps reach can be read.
    void operator()(const T* x, const Runs& runs, float* out) const {
        if (!transforms_) {
            direct(x, runs, out);
            return;
        }
        if constexpr (kMayTransform) transformed(x, runs, out);
    }

private:
    void direct(const T* x, const Runs& runs, float* out) const {
        if constexpr (!kWidens<T>) {
            product(products_[0], x, runs, out);
        } else {
            static thread_local Buffer<E> buffer;
            if (runs.empty()) return;
            const std::int64_t reach = std::int64_t{taps_ / 2} * dilation_, first = runs.front().first - reach;
            const std::int64_t last = runs.back().first + runs.back().rows + reach;
            E* room = buffer.room((last - first) * channels_);
            const E* rows = factors(x + first * channels_, (last - first) * channels_, room);
            product(products_[0], rows - first * channels_, runs, out);
        }
    }

    void transformed(const T* x, const Runs& runs, float* out) const {
        static thread_local std::vector<Four> fours;
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<T> zeros;
        const int groups = taps_ / kGroupTaps, width = groups * channels_;
        fours_of(runs, dilation_, fours);
        T* zero = zeros.room(channels_);
        std::memset(zero, 0, sizeof(T) * channels_);
        const std::int64_t in_stride = std::int64_t{kFours} * width, out_stride = std::int64_t{kFours} * channels_;
        float* inputs = buffer.room(kPoints * (in_stride + out_stride));
        float* sums = inputs + kPoints * in_stride;
        for (std::size_t done = 0; done < fours.size(); done += kFours) {
            const int n = static_cast<int>(std::min<std::size_t>(kFours, fours.size() - done));
            for (int m = 0; m < n; ++m) {
                const Four four = fours[done + m];
                for (int g = 0; g < groups; ++g) {
                    const T* rows[kPoints];
                    for (int i = 0; i < kPoints; ++i) {
                        const int row = four.row + (kGroupTaps * g + i - taps_ / 2) * dilation_;
                        rows[i] = row < four.end ? x + std::int64_t{row} * channels_ : zero;
                    }
                    transform_input(rows, channels_, inputs + std::int64_t{m} * width + g * channels_, in_stride);
                }
            }
            for (int j = 0; j < kPoints; ++j)
                product(products_[j], inputs + j * in_stride, Runs{{0, n, n}}, sums + j * out_stride);
            for (int m = 0; m < n; ++m) {
                const Four four = fours[done + m];
                const int rows = (four.end - four.row + dilation_ - 1) / dilation_;
                transform_output(sums + std::int64_t{m} * channels_, out_stride, bias_, channels_, std::min(rows, kOutputs),
                                 out + std::int64_t{four.row} * channels_, std::int64_t{dilation_} * channels_);
            }
        }
    }

    static float number(float x) { return x; }
    static float number(bf16 x) { return widened(x); }

    const float* bias_;
    int channels_, taps_, dilation_;
    bool transforms_;
    Buffer<E> weights_;
    Product<E> products_[kPoints];
};
