"""Modules written in the language itself: SOURCES[name] defines module(), which
returns the module's names. Their work is counted as the program's own."""

ITERTOOLS = """
def module():
  def count(start=0, step=1):
    while True:
      yield start
      start += step
  def cycle(iterable):
    saved = []
    for item in iterable:
      yield item
      saved.append(item)
    while saved:
      for item in saved:
        yield item
  def repeat(value, times=None):
    if times is None:
      while True:
        yield value
    for _ in range(times):
      yield value
  def from_iterable(iterables):
    for iterable in iterables:
      for item in iterable:
        yield item
  def chain(*iterables):
    return from_iterable(iterables)
  chain.from_iterable = from_iterable
  def accumulate(iterable, func=None, *, initial=None):
    it = iter(iterable)
    total = initial
    if initial is None:
      for total in it:
        break
      else:
        return
    yield total
    for item in it:
      total = total + item if func is None else func(total, item)
      yield total
  def islice(iterable, *args):
    part = slice(*args)
    bounds = [*args, None] if len(args) > 1 else [0, *args]
    start, stop, step = [*bounds, None][:3]
    start = 0 if start is None else start
    step = 1 if step is None else step
    if start < 0 or (stop is not None and stop < 0) or step < 1:
      raise ValueError('Indices for islice() must be None or from 0 on')
    it = iter(iterable)
    over = []
    def items():
      at = 0
      wanted = start
      while True:
        while at < wanted:
          if next(it, over) is over:
            return
          at += 1
        if stop is not None and at >= stop:
          return
        item = next(it, over)
        if item is over:
          return
        at += 1
        wanted += step
        if stop is not None and wanted > stop:
          wanted = stop
        yield item
    return items()
  def takewhile(predicate, iterable):
    for item in iterable:
      if not predicate(item):
        break
      yield item
  def dropwhile(predicate, iterable):
    dropping = True
    for item in iterable:
      dropping = dropping and predicate(item)
      if not dropping:
        yield item
  def filterfalse(predicate, iterable):
    for item in iterable:
      if not (item if predicate is None else predicate(item)):
        yield item
  def compress(data, selectors):
    for item, kept in zip(data, selectors):
      if kept:
        yield item
  def starmap(function, iterable):
    for args in iterable:
      yield function(*args)
  def pairwise(iterable):
    it = iter(iterable)
    for before in it:
      break
    for item in it:
      yield before, item
      before = item
  def zip_longest(*iterables, fillvalue=None):
    iterators = [iter(i) for i in iterables]
    missing = []
    ended = [False for _ in iterators]
    while True:
      row = []
      for i, it in enumerate(iterators):
        item = missing if ended[i] else next(it, missing)
        if item is missing:
          ended[i] = True
          item = fillvalue
        row.append(item)
      if all(ended):
        return
      yield tuple(row)
  def groupby(iterable, key=None):
    it = iter(iterable)
    over = []
    item = over
    name = None
    turn = 0
    def read():
      nonlocal item, name
      item = next(it, over)
      if item is not over:
        name = item if key is None else key(item)
    def among(group):
      return item is not over and (name is group or name == group)
    def members(mine, group):
      while turn == mine and among(group):
        yield item
        if turn == mine:
          read()
    def groups():
      nonlocal turn
      read()
      while item is not over:
        turn += 1
        group = name
        yield group, members(turn, group)
        while among(group):
          read()
      turn += 1
    return groups()
  def product(*iterables, repeat=1):
    pools = [tuple(i) for i in iterables] * repeat
    if not all(pools):
      return
    at = [0 for _ in pools]
    while True:
      yield tuple(pool[i] for pool, i in zip(pools, at))
      for place in range(len(pools) - 1, -1, -1):
        at[place] += 1
        if at[place] < len(pools[place]):
          break
        at[place] = 0
      else:
        return
  def permutations(iterable, r=None):
    pool = tuple(iterable)
    n = len(pool)
    r = n if r is None else r
    if r > n:
      return
    order = list(range(n))
    cycles = list(range(n, n - r, -1))
    yield tuple(pool[i] for i in order[:r])
    while n:
      for i in range(r - 1, -1, -1):
        cycles[i] -= 1
        if cycles[i] == 0:
          order[i:] = order[i + 1:] + order[i:i + 1]
          cycles[i] = n - i
        else:
          j = cycles[i]
          order[i], order[-j] = order[-j], order[i]
          yield tuple(pool[i] for i in order[:r])
          break
      else:
        return
  def choose(pool, r, again):
    n = len(pool)
    if r > n and not (again and n) and r > 0:
      return
    at = [0 if again else i for i in range(r)]
    yield tuple(pool[i] for i in at)
    while True:
      for place in range(r - 1, -1, -1):
        if at[place] < (n - 1 if again else n - r + place):
          break
      else:
        return
      value = at[place] + 1
      for later in range(place, r):
        at[later] = value if again else value + later - place
      yield tuple(pool[i] for i in at)
  def combinations(iterable, r):
    if r < 0:
      raise ValueError('r must be non-negative')
    return choose(tuple(iterable), r, False)
  def combinations_with_replacement(iterable, r):
    if r < 0:
      raise ValueError('r must be non-negative')
    return choose(tuple(iterable), r, True)
  return {
    'accumulate': accumulate, 'chain': chain, 'combinations': combinations,
    'combinations_with_replacement': combinations_with_replacement,
    'compress': compress, 'count': count, 'cycle': cycle,
    'dropwhile': dropwhile, 'filterfalse': filterfalse, 'groupby': groupby,
    'islice': islice, 'pairwise': pairwise, 'permutations': permutations,
    'product': product, 'repeat': repeat, 'starmap': starmap,
    'takewhile': takewhile, 'zip_longest': zip_longest,
  }
"""
FUNCTOOLS = """
def module(rename, refuse):
  missing = []
  def reduce(function, iterable, initial=missing):
    it = iter(iterable)
    value = initial
    if value is missing:
      for value in it:
        break
      else:
        raise TypeError('reduce() of empty iterable with no initial value')
    for item in it:
      value = function(value, item)
    return value
  def cache(function):
    known = {}
    def cached(*args, **kwargs):
      key = (args, tuple(kwargs.items())) if kwargs else args
      if key in known:
        return known[key]
      value = function(*args, **kwargs)
      known[key] = value
      return value
    rename(cached, function)
    cached.cache_clear = known.clear
    cached.cache_info = refuse
    return cached
  def lru_cache(maxsize=128, typed=False):
    return cache(maxsize) if callable(maxsize) else cache
  def partial(function, /, *given, **named):
    def call(*args, **kwargs):
      return function(*given, *args, **{**named, **kwargs})
    return call
  def wraps(function):
    return lambda wrapper: rename(wrapper, function)
  def cmp_to_key(compare):
    class Key:
      def __init__(self, value):
        self.value = value
      def __lt__(self, other):
        return compare(self.value, other.value) < 0
      def __gt__(self, other):
        return compare(self.value, other.value) > 0
      def __eq__(self, other):
        return compare(self.value, other.value) == 0
    return Key
  return {
    'cache': cache, 'cmp_to_key': cmp_to_key, 'lru_cache': lru_cache,
    'partial': partial, 'reduce': reduce, 'wraps': wraps,
  }
"""
HEAPQ = """
def module():
  def down(heap, start, at):
    item = heap[at]
    while at > start:
      parent = (at - 1) >> 1
      if not item < heap[parent]:
        break
      heap[at] = heap[parent]
      at = parent
    heap[at] = item
  def up(heap, at):
    end, start, item = len(heap), at, heap[at]
    child = 2 * at + 1
    while child < end:
      right = child + 1
      if right < end and not heap[child] < heap[right]:
        child = right
      heap[at] = heap[child]
      at = child
      child = 2 * at + 1
    heap[at] = item
    down(heap, start, at)
  def heappush(heap, item):
    heap.append(item)
    down(heap, 0, len(heap) - 1)
  def heappop(heap):
    last = heap.pop()
    if not heap:
      return last
    first = heap[0]
    heap[0] = last
    up(heap, 0)
    return first
  def heapreplace(heap, item):
    first = heap[0]
    heap[0] = item
    up(heap, 0)
    return first
  def heappushpop(heap, item):
    if heap and heap[0] < item:
      item, heap[0] = heap[0], item
      up(heap, 0)
    return item
  def heapify(heap):
    for i in range(len(heap) // 2 - 1, -1, -1):
      up(heap, i)
  def nsmallest(n, iterable, key=None):
    return sorted(iterable, key=key)[:max(n, 0)]
  def nlargest(n, iterable, key=None):
    return sorted(iterable, key=key, reverse=True)[:max(n, 0)]
  return {
    'heapify': heapify, 'heappop': heappop, 'heappush': heappush,
    'heappushpop': heappushpop, 'heapreplace': heapreplace,
    'nlargest': nlargest, 'nsmallest': nsmallest,
  }
"""
BISECT = """
def module():
  def bisect_left(a, x, lo=0, hi=None, *, key=None):
    if lo < 0:
      raise ValueError('lo must be non-negative')
    hi = len(a) if hi is None else hi
    while lo < hi:
      mid = (lo + hi) // 2
      if (a[mid] if key is None else key(a[mid])) < x:
        lo = mid + 1
      else:
        hi = mid
    return lo
  def bisect_right(a, x, lo=0, hi=None, *, key=None):
    if lo < 0:
      raise ValueError('lo must be non-negative')
    hi = len(a) if hi is None else hi
    while lo < hi:
      mid = (lo + hi) // 2
      if x < (a[mid] if key is None else key(a[mid])):
        hi = mid
      else:
        lo = mid + 1
    return lo
  def insort_left(a, x, lo=0, hi=None, *, key=None):
    a.insert(bisect_left(a, x if key is None else key(x), lo, hi, key=key), x)
  def insort_right(a, x, lo=0, hi=None, *, key=None):
    a.insert(bisect_right(a, x if key is None else key(x), lo, hi, key=key), x)
  return {
    'bisect': bisect_right, 'bisect_left': bisect_left,
    'bisect_right': bisect_right, 'insort': insort_right,
    'insort_left': insort_left, 'insort_right': insort_right,
  }
"""
OPERATOR = """
def module():
  def itemgetter(*keys):
    if len(keys) == 1:
      return lambda value: value[keys[0]]
    return lambda value: tuple(value[key] for key in keys)
  return {
    'add': lambda a, b: a + b, 'sub': lambda a, b: a - b,
    'mul': lambda a, b: a * b, 'truediv': lambda a, b: a / b,
    'floordiv': lambda a, b: a // b, 'mod': lambda a, b: a % b,
    'pow': lambda a, b: a ** b, 'neg': lambda a: -a, 'xor': lambda a, b: a ^ b,
    'and_': lambda a, b: a & b, 'or_': lambda a, b: a | b,
    'lt': lambda a, b: a < b, 'le': lambda a, b: a <= b,
    'gt': lambda a, b: a > b, 'ge': lambda a, b: a >= b,
    'eq': lambda a, b: a == b, 'ne': lambda a, b: a != b,
    'itemgetter': itemgetter,
  }
"""
SOURCES = {
  'bisect': BISECT,
  'functools': FUNCTOOLS,
  'heapq': HEAPQ,
  'itertools': ITERTOOLS,
  'operator': OPERATOR,
}
