// Convolutions of rows by Winograd's minimal filtering (Lavin and Gray 2016, arXiv:1509.09308): F(4, 3) where products are of
// float32, F(2, 3) where they are of bfloat16, on the tile unit one product per tap.
//
// Nine taps are three groups of three. F(4, 3) computes four outputs of three taps with six products instead of twelve, with
// points 0, 1, -1, 2, -2 and infinity; F(2, 3) two with four instead of six, with 0, 1, -1 and infinity. The groups' products
// are summed before the results are transformed back. Outputs go in fours, or twos, that are counted from a protein's first
// row, those of a dilated convolution `dilation` rows apart, and rows behind a protein count as zeros: so a row's bits do not
// depend on the batch.

constexpr int kOutputs = 4;  // at most
constexpr int kGroupTaps = 3;

template <class E>
struct Winograd;

template <>
struct Winograd<float> {
    static constexpr int outputs = 4, points = 6;

    // What the weights of a group's three taps are multiplied by, for each of the products.
    static constexpr double from_taps[points][kGroupTaps] = {
        {1.0 / 4, 0, 0},
        {-1.0 / 6, -1.0 / 6, -1.0 / 6},
        {-1.0 / 6, 1.0 / 6, -1.0 / 6},
        {1.0 / 24, 1.0 / 12, 1.0 / 6},
        {1.0 / 24, -1.0 / 12, 1.0 / 6},
        {0, 0, 1},
    };

    // The inputs of a group's products from as many rows.
    template <class T>
    static void transform_input(const T* const rows[points], int channels, float* out, std::int64_t stride) {
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

    // Results from the sums of the products; those beyond `rows` are not written.
    static void transform_output(const float* sums, std::int64_t stride, const float* bias, int channels, int rows, float* out,
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
};

template <>
struct Winograd<bf16> {
    static constexpr int outputs = 2, points = 4;
    static constexpr double from_taps[points][kGroupTaps] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

    static void transform_input(const bf16* const rows[points], int channels, bf16* out, std::int64_t stride) {
        for (int c = 0; c < channels; c += kLanes) {
            const Floats d0 = load(rows[0] + c), d1 = load(rows[1] + c), d2 = load(rows[2] + c), d3 = load(rows[3] + c);
            bf16* o = out + c;
            store(o, d0 - d2);
            store(o + stride, d1 + d2);
            store(o + 2 * stride, d2 - d1);
            store(o + 3 * stride, d1 - d3);
        }
    }

    static void transform_output(const float* sums, std::int64_t stride, const float* bias, int channels, int rows, float* out,
                                 std::int64_t out_stride) {
        for (int c = 0; c < channels; c += kLanes) {
            const float* y = sums + c;
            const Floats y1 = load(y + stride), y2 = load(y + 2 * stride);
            const Floats start = bias ? load(bias + c) : Floats{};
            store(out + c, start + (load(y) + y1 + y2));
            if (rows > 1) store(out + out_stride + c, start + (y1 - y2 - load(y + 3 * stride)));
        }
    }
};

#ifdef PBF_TILES
template <class E>
constexpr bool kTransforms = std::is_same_v<E, float>;
#else
template <class E>
constexpr bool kTransforms = true;
#endif

// Some outputs, `dilation` rows apart from `row` on. Rows from `end` on are behind the protein.
struct Outputs {
    int row, end;
};

// Those of runs whose first rows are multiples of outputs * dilation away from their protein's.
inline void outputs_of(const Runs& runs, int outputs, int dilation, std::vector<Outputs>& found) {
    found.clear();
    for (const Run& run : runs)
        for (int row = run.first; row < run.first + run.rows; row += outputs * dilation)
            for (int phase = 0; phase < std::min(dilation, run.first + run.rows - row); ++phase)
                found.push_back({row + phase, run.end});
}

// How many are transformed and multiplied at a time: their inputs stay in the second-level cache.
constexpr int kAtOnce = 4 * PBF_ROWS;

inline float rounded(double x, float) { return static_cast<float>(x); }
inline bf16 rounded(double x, bf16) {
    bf16 lanes[kLanes];
    store(lanes, splat(static_cast<float>(x)));
    return lanes[0];
}

// A convolution of (rows, channels) to as many, its weights packed for this instruction set.
template <class T>
class Convolution {
public:
    using E = Factor<T>;
    using Filter = Winograd<E>;

    // Weights are w[column * column_stride + input * input_stride + tap * tap_stride]; bias is (channels,) or null.
    Convolution(const T* w, std::int64_t column_stride, int input_stride, int tap_stride, const float* bias, int channels,
                int taps, int dilation, int threads)
        : bias_(bias), channels_(channels), taps_(taps), dilation_(dilation),
          transforms_(kTransforms<E> && taps % kGroupTaps == 0) {
        const int inputs = transforms_ ? taps / kGroupTaps * channels : channels;
        const int matrices = transforms_ ? Filter::points : 1;
        const std::int64_t values = std::int64_t{inputs} * channels * (transforms_ ? 1 : taps);
        E* room = weights_.room(values * matrices);
        for (int j = 0; j < matrices; ++j)
            products_[j] = {room + j * values, transforms_ ? nullptr : bias, inputs, channels, transforms_ ? 1 : taps, dilation,
                            channels};
        parallel_for(channels / 16, threads, [&](std::int64_t sixteen) {
            std::vector<E> column(transforms_ ? inputs : 0);
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                const T* from = w + c * column_stride;
                if (!transforms_) {
                    pack_column(from, input_stride, tap_stride, products_[0], c, room);
                    continue;
                }
                for (int j = 0; j < Filter::points; ++j) {
                    for (int i = 0; i < inputs; ++i) {
                        const T* taps_of = from + std::int64_t{i % channels} * input_stride +
                                           std::int64_t{i / channels} * kGroupTaps * tap_stride;
                        double sum = 0;
                        for (int k = 0; k < kGroupTaps; ++k)
                            sum += Filter::from_taps[j][k] * static_cast<double>(number(taps_of[k * tap_stride]));
                        column[i] = rounded(sum, E{});
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
        if (transforms_)
            transformed(x, runs, out);
        else
            direct(x, runs, out);
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
        constexpr int points = Filter::points;
        static thread_local std::vector<Outputs> groups_of_outputs;
        static thread_local Buffer<E> input_buffer;
        static thread_local Buffer<float> sum_buffer;
        static thread_local Buffer<T> zeros;
        const int groups = taps_ / kGroupTaps, width = groups * channels_;
        outputs_of(runs, Filter::outputs, dilation_, groups_of_outputs);
        T* zero = zeros.room(channels_);
        std::memset(zero, 0, sizeof(T) * channels_);
        const std::int64_t in_stride = std::int64_t{kAtOnce} * width, out_stride = std::int64_t{kAtOnce} * channels_;
        E* inputs = input_buffer.room(points * in_stride);
        float* sums = sum_buffer.room(points * out_stride);
        for (std::size_t done = 0; done < groups_of_outputs.size(); done += kAtOnce) {
            const int n = static_cast<int>(std::min<std::size_t>(kAtOnce, groups_of_outputs.size() - done));
            for (int m = 0; m < n; ++m) {
                const Outputs of = groups_of_outputs[done + m];
                for (int g = 0; g < groups; ++g) {
                    const T* rows[points];
                    for (int i = 0; i < points; ++i) {
                        const int row = of.row + (kGroupTaps * g + i - taps_ / 2) * dilation_;
                        rows[i] = row < of.end ? x + std::int64_t{row} * channels_ : zero;
                    }
                    Filter::transform_input(rows, channels_, inputs + std::int64_t{m} * width + g * channels_, in_stride);
                }
            }
            for (int j = 0; j < points; ++j)
                product(products_[j], inputs + j * in_stride, Runs{{0, n, n}}, sums + j * out_stride);
            for (int m = 0; m < n; ++m) {
                const Outputs of = groups_of_outputs[done + m];
                const int rows = (of.end - of.row + dilation_ - 1) / dilation_;
                Filter::transform_output(sums + std::int64_t{m} * channels_, out_stride, bias_, channels_,
                                         std::min(rows, Filter::outputs), out + std::int64_t{of.row} * channels_,
                                         std::int64_t{dilation_} * channels_);
            }
        }
    }

    static float number(float x) { return x; }
    static float number(bf16 x) { return widened(x); }

    const float* bias_;
    int channels_, taps_, dilation_;
    bool transforms_;
    Buffer<E> weights_;
    Product<E> products_[Filter::points];
};
